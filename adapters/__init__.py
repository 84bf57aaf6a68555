"""Any pipeline of diffusers in the place of SD3, and rewards that are longer than a screen."""
