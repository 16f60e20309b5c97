"""What sets are worth on image and text encoders that took no part in learning them; see `__main__`."""
