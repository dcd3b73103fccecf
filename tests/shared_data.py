"""Where the files that tests read lie: small public ones in the checkout, larger real inputs beside it.

No other file of the tests says where that is (test_shared_data). A checkout need not have `../shared`: a test that
reads it carries `needs_shared` with the names that it reads, and is skipped, by name, where one of them is absent.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
HF_CONFIGS = ROOT / "tests" / "data" / "hf_configs"


def needs_shared(*names: str) -> pytest.MarkDecorator:
    """The mark of a test that reads these files or folders of SHARED."""
    absent = [f"../shared/data/{name}" for name in names if not (SHARED / name).exists()]
    return pytest.mark.skipif(bool(absent), reason=f"this checkout has no {', no '.join(absent)}")
