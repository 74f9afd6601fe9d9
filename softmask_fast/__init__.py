"""Text-driven soft masks and focal contrastive learning for vision-language pretraining (SoftMask++), fast.

Importing the package loads nothing else: take the operators from `softmask_fast.ops` (torch alone), everything else
from its own module.
"""

__version__ = "0.1.0"
