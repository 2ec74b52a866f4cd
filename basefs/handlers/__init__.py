"""how a base image is prepared, behind init, fetch_image and remove_image."""
