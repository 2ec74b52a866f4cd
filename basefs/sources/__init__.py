"""Bytes and metadata from Glance; everything its libraries may raise becomes one of our errors here."""
