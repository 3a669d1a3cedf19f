"""Settings of the whole test run."""

import logging

import torch

# One thread in each process: the tests run in parallel, and small models gain nothing from more.
torch.set_num_threads(1)

# Products of float32 are float32 on a GPU too.
torch.set_float32_matmul_precision("highest")

# pytest puts a handler on loggers that do not propagate; on this one a handler makes torch format
# every graph it traces, which costs a third of the time.
logging.getLogger("torch.__trace").propagate = True
