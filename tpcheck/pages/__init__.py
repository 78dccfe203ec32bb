"""What reports have in common: pieces of HTML pages, colours of pictures."""
