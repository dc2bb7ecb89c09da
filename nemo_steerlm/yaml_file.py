"""Small YAML files, read strictly, because they may come from other people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

_LARGEST = 1 << 20  # bytes
_DEEPEST = 20


def read_yaml(path: Path, error: type[Exception]) -> Any:
    """Return the content of a plain YAML file: no aliases, no tags, no repeated key.

    With aliases nine lines of text can expand to a thousand million entries; of a repeated key, one value is lost.

    Args:
        path: The file.
        error: Raised, with file and line, for any other file.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise error(f"{path}: {path.stat().st_size:,} bytes, expected a small YAML file")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Strict)  # noqa: S506 - a child of SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, OSError) as problem:
        if isinstance(problem, error):
            raise
        said = " ".join(str(problem).split()).replace('in "<unicode string>", ', "")
        raise error(f"{path}: not a YAML file we read: {said[:300]}") from None


class _Strict(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, f"alias *{event.anchor}, write the value out", event.start_mark)
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.MarkedYAMLError(None, None, f"nested more than {_DEEPEST} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key '{key.value}' is there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)
