"""Boxes, crops, video in and out."""
