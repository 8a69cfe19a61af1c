"""tools/serve.py on two and four simulated cards that share a model."""

import pytest

from simulator.environment import environment, unavailable
from tests.conftest import ROOT
from tests.distributed.test_serving import check_serving
from tests.distributed.test_training import PATIENT

pytestmark = [pytest.mark.ascend, pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))]


@pytest.mark.parametrize("cards", [2, 4])
def test_cards_serve_as_one(msrun, tmp_path, cards):
    """In float32, so that the tokens are those of one CPU: put back, shared, in parts, with an adapter."""
    check_serving(msrun, tmp_path, cards, environment(base={"PYTHONPATH": str(ROOT)}, **PATIENT))
