"""Where kernel tests run: on a GPU if there is one, else interpreted on the CPU."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
