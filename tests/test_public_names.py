"""`import softmask_fast as sf`: the public names are there, and loaded when first used."""

import subprocess
import sys
from pathlib import Path

from softmask_fast.installation import install_command

PUBLIC = """
import sys
import softmask_fast as sf
assert "torch" not in sys.modules
assert set(sf.__all__) <= set(dir(sf)) and "torch" not in sys.modules
import softmask_fast.ops as ops
assert {name: getattr(sf, name) for name in ops.__all__} == {name: getattr(ops, name) for name in ops.__all__}
assert set(sf.__all__) == {*ops.__all__, "draw", "load_model", "__version__"}
assert "transformers" not in sys.modules
from softmask_fast import load_model
import softmask_fast.model.pretrained
assert load_model is sf.load_model is softmask_fast.model.pretrained.load_model
assert not hasattr(sf, "no_such_name")
"""

MISSING_EXTRA = """
import sys
sys.modules["timm"] = None
import softmask_fast as sf
try:
    sf.load_model
except ImportError as error:
    print(error)
"""


def run_python(code):
    """What a new process prints."""
    folder = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_root_has_the_public_names_loaded_when_first_used():
    run_python(PUBLIC)


def test_load_model_without_its_packages_says_what_to_install():
    message = run_python(MISSING_EXTRA)
    assert message.startswith("load_model: ") and "timm" in message and message.count("\n") == 1
    assert message.endswith(f"install it with: {install_command('look')}\n")
