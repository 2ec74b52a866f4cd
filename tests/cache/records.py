"""Image records for tests."""

from basefs.catalog.records import ImageRecord


def record(image_id: str, **changes) -> ImageRecord:
    values = {
        "image_id": image_id,
        "name": f"name of {image_id}",
        "size": 4096,
        "disk_format": "raw",
        "container_format": "bare",
        "status": "active",
        "visibility": "public",
        "os_hidden": False,
        "owner": "o",
        "created_at": "2026-11-22T00:00:00Z",
        "updated_at": "2026-11-22T00:00:00Z",
        "checksum": None,
        "os_hash_algo": "sha512",
        "os_hash_value": "00",
        "is_signed": False,
    }
    return ImageRecord(**{**values, **changes})
