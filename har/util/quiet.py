"""Loads TensorFlow without the messages that its C++ side prints before any log level applies."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _TensorFlowFinder(MetaPathFinder):
    """Finds TensorFlow once, and wraps its loading in `quiet_loading`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "tensorflow":
            return None
        # found again below, by Python's own finders
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_quietly(module: ModuleType) -> None:
            # needs click, which a program that only imports `har` may lack
            from har.util.progress import quiet_loading

            with quiet_loading():
                load(module)

        spec.loader.exec_module = load_quietly  # type: ignore[method-assign]
        return spec


def load_tensorflow_quietly() -> None:
    """Make the next `import tensorflow` quiet, whichever module of this process does it first."""
    if "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, _TensorFlowFinder())
