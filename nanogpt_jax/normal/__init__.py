"""Is a run normal? Reference bands of the recipes that are really trained here, and whether a run lies within."""
