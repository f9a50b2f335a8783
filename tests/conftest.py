"""What all tests share: one thread a process, and no reach outside this machine."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # ranks are forked: a thread pool in the parent would not survive it
