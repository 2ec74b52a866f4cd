"""Whose credentials a section of keystoneauth's options uses."""

from oslo_config import cfg

GLANCE_SECTION = "glance"


def auth_section_of(conf: cfg.ConfigOpts, section: str) -> str:
    """The section that `section` takes its auth options from: its own, or its auth_section's, else [glance]'s."""
    own, glance = conf[section], conf[GLANCE_SECTION]
    chosen: str = own.auth_section or (section if own.auth_type else GLANCE_SECTION)
    return glance.auth_section or GLANCE_SECTION if chosen == GLANCE_SECTION else chosen
