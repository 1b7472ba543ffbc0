"""Finds the compiled part of the package.

Installed, it lies beside this file. In a checkout whose package was installed with `pip install .`, `python -m probquant`
imports the checkout (Python puts the working folder first), so the installed copy is looked up.
"""

import importlib.metadata
from pathlib import Path


def find() -> Path:
    """Folder of `_native` and `_torch_ops.so`. Raises ImportError where the package was never built."""
    here = Path(__file__).parent
    # More than one may answer to the name: a build leaves its egg-info in the checkout.
    installed = [Path(str(d.locate_file("probquant"))) for d in importlib.metadata.distributions(name="probquant")]
    for folder in (here, *installed):
        if (folder / "_torch_ops.so").exists():
            return folder
    raise ImportError(f"probquant's native code is not built: run `pip install .` in {here.parent}")
