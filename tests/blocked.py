"""Python code that begins with a library missing, as where it is not installed."""


def without(name: str) -> str:
    """What a process runs first, so that `import name` fails in it."""
    return f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "{name}":
            raise ModuleNotFoundError("{name} is not installed", name=name)

sys.meta_path.insert(0, Missing())
"""
