"""A conversation that ends its process as kill -9 does, at the turn that the variable DIES_AT counts to."""

import os
import signal

from embodied_rft.envs.serving import serve
from embodied_rft.envs.turns.lifted import Lifted

DIES_AT = "TOLD_DIES_AT"  # of the turns of all batches of the process: training, then evaluation, then training ...


class Mortal(Lifted):
    """As `Lifted`, until then."""

    taken = 0

    def step(self, rows, actions):
        Mortal.taken += 1
        if Mortal.taken == int(os.environ.get(DIES_AT, 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(rows, actions)


serve("toy/Mortal-v0", Mortal)
