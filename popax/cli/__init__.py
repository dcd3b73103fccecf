"""The doors: commands and gin. Nothing below imports them."""
