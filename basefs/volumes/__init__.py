"""Cinder volumes behind images, attached to this host. Only this folder knows cinderclient and os-brick."""
