"""Configs: one file per study or model."""
