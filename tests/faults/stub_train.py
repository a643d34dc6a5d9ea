"""`noisepolicy-train` on the stub model."""

import sys

from stub_world import StubModel

import noisepolicy.training.task
from noisepolicy.cli.train import main
from noisepolicy.rewards import http_client

noisepolicy.training.task.load_model = lambda *_, **__: StubModel()
http_client._FIRST_WAIT_S = 0.02
sys.exit(main(sys.argv[1:]))
