"""The embedded world: its sentences and pictures, its model and its judges."""
