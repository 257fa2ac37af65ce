"""Devices, the mesh over them, and which parameter lies where."""
