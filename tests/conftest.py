"""Triton kernels run in Triton's interpreter in every test: it is asked for before anything can
import them.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
