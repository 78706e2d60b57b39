"""Published numbers, and the scripts that gather them."""
