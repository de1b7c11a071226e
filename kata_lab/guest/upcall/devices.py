"""The device manager: it takes and gives up CPUs and devices when the VMM asks for that (see upcall.py)."""

import upcall

upcall.serve()
