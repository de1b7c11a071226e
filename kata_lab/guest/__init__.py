"""What runs inside a guest, in MicroPython 1.25: the image builder copies these files, the host never imports them."""
