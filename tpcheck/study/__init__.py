"""Studies: what others claimed about tensor parallelism, measured again, each with a page of what was found.

study.py      what a study is made of
names.py      which there are; each is a module of this package that holds `STUDY`
command.py    `tpcheck study NAME`: refuse, run the parts that are not on record, write the page
page.py       what a page is made of; html.py and markdown.py write it
ranks.py      gloo ranks for parts that need some
"""
