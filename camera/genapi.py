"""The features of a camera behind a GenApi node map, as pypylon and harvesters both hand it out."""

import contextlib
from collections.abc import Iterable
from typing import Any

from flawline.camera.features import Feature, FeatureMap, Kind, Value

_KINDS: tuple[tuple[str, Kind], ...] = (
    ("enum", "enumeration"),
    ("integer", "integer"),
    ("float", "float"),
    ("boolean", "boolean"),
    ("command", "command"),
    ("string", "string"),
)


class GenApiFeatures(FeatureMap):
    """A node map. pypylon writes the standard's names in capitals (`GetNode`), harvesters in snakes (`get_node`)."""

    def __init__(self, node_map: Any, library: Any) -> None:
        """`library` is `pypylon.genicam` or `genicam.genapi`."""
        self._map = node_map
        self._capitals = hasattr(node_map, "GetNode")
        self._is_writable = library.IsWritable if self._capitals else library.is_writable
        self._is_readable = library.IsReadable if self._capitals else library.is_readable
        self._is_implemented = library.IsImplemented if self._capitals else library.is_implemented
        self._not_there: type[Exception] = library.LogicalErrorException
        self._errors: type[Exception] = library.GenericException

    def _get(self, node: Any, word: str) -> Any:
        return getattr(node, word if self._capitals else word.lower())

    def _node(self, name: str) -> Any:
        try:
            node = self._map.GetNode(name) if self._capitals else self._map.get_node(name)
        except self._not_there:
            return None
        return node if node is not None and self._is_implemented(node) else None

    def names(self) -> Iterable[str]:
        """Every node that the camera's description calls a feature."""
        if self._capitals:
            nodes = [node.GetNode() for node in self._map.GetNodes()]
            return sorted(node.GetName() for node in nodes if node.IsFeature())
        return sorted(item.node.name for item in self._map.nodes if item.node.is_feature())

    def feature(self, name: str) -> Feature | None:
        """Its state as the camera has it now."""
        node = self._node(name)
        if node is None:
            return None
        class_name = type(node).__name__.lower()
        kind: Kind = next((kind for word, kind in _KINDS if word in class_name), "other")
        low = high = step = None
        if kind in ("integer", "float"):
            with contextlib.suppress(self._errors):  # not readable now
                low, high = self._get(node, "Min"), self._get(node, "Max")
                step = self._get(node, "Inc") if kind == "integer" else None
        entries = tuple(self._get(node, "Symbolics")) if kind == "enumeration" else ()
        return Feature(name, kind, bool(self._is_writable(node)), low, high, step, entries)

    def read(self, name: str) -> Value | None:
        """Its value, asked of the camera and not of a cache."""
        node = self._node(name)
        if node is None or not self._is_readable(node):
            return None
        if "enum" in type(node).__name__.lower():
            ask = node.ToString if self._capitals else node.to_string
        else:
            ask = node.GetValue if self._capitals else node.get_value
        value: Value = ask(False, True)  # not verified; down to the register, past what the nodes on the way keep
        return value

    def write(self, feature: Feature, value: Value) -> None:
        """Set it."""
        node = self._node(feature.name)
        if self._capitals:
            node.SetValue(value)
        else:
            node.value = value

    def execute(self, name: str) -> None:
        """Send the command."""
        node = self._node(name)
        if self._capitals:
            node.Execute()
        else:
            node.execute()
