"""What all tests share: OpenBLAS before mlx, the embedded model, and the shared assets where they are."""

import os
import signal
from pathlib import Path

from mlxtune import machine

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", NO_COLOR="1")
machine.prepare()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it runs in the background

import pytest  # noqa: E402

import mlxtune  # noqa: E402

PACKAGE = Path(mlxtune.__file__).parent


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded base model."""
    return PACKAGE / "assets" / "tiny"


@pytest.fixture(scope="session")
def shared_assets() -> Path:
    """The folder of real models and data beside the checkout; tests that need it skip without it."""
    folder = PACKAGE.parent.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("needs the shared assets, which are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def stories(shared_assets: Path) -> Path:
    """stories260K, a real trained model without a chat template."""
    return shared_assets / "models" / "stories260K"
