"""YAML that anybody may have written: bounded in size, in depth and in what its aliases stand for."""

from __future__ import annotations

from typing import Any

import yaml

from tpcheck.errors import shown

__all__ = ["parse_yaml"]

LETTERS = 1 << 20
DEPTH = 32
NODES = 100_000  # an alias counts as all that it stands for


def parse_yaml(text: str) -> Any:
    """What `text` holds.

    Raises:
        ValueError: it is not YAML, or more of it than a file of settings can be; says what is wrong, in a line.
    """
    if len(text) > LETTERS:
        raise ValueError(f"{len(text)} letters, settings have at most {LETTERS}")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses what it would not come to the end of, and keys that are given twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.sizes: dict[int, int] = {}  # of nodes that are whole, by identity

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEPTH:
            raise ValueError(f"nested more than {DEPTH} deep")
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not is_alias:
            self.sizes[id(node)] = sum((self.sizes[id(inner)] for inner in _inside(node)), 1)
        elif id(node) not in self.sizes:
            raise ValueError("an alias inside of what it stands for")
        if self.sizes[id(node)] > NODES:
            raise ValueError(f"more than {NODES} values, aliases written out")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"the key {shown(twice[0])} is given twice")
        return super().construct_mapping(node, deep)


def _inside(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
