"""Recipes: YAML files that `rwkv-cluster` accepts, shipped with the package."""
