"""The configuration files of Cinder and of what Glance needs to keep images in it, as functions of a few values."""

CINDER = """[DEFAULT]
log_file = {d}/log/cinder.log
state_path = {d}/cinder
transport_url = fake:/
auth_strategy = {auth_strategy}
host = rig
my_ip = {host}
api_paste_config = {d}/cinder/api-paste.ini
resource_query_filters_file = {venv}/etc/cinder/resource_filters.json
glance_api_servers = {glance_url}
enabled_backends = {backends}
default_volume_type = multi
image_conversion_dir = {d}/cinder/conversion
volume_clear = none
allowed_direct_url_schemes = cinder
# Service.service_id is a class attribute: in one process every heartbeat is the last service's, and the others would be
# down after this time.
service_down_time = 100000000
periodic_fuzzy_delay = 0
scheduler_driver_init_wait_time = 1
[database]
connection = sqlite:///{d}/cinder/cinder.sqlite?timeout=60
sqlite_synchronous = false
[oslo_concurrency]
lock_path = {d}/lock
[coordination]
backend_url = file://{d}/cinder/coordination
[keystone_authtoken]
service_token_roles = service
[cinder_sys_admin]
helper_command = {venv}/bin/privsep-helper --config-file {d}/cinder/cinder.conf
[privsep_osbrick]
helper_command = {venv}/bin/privsep-helper --config-file {d}/cinder/cinder.conf
"""

LOOP_BACKEND = """[loop]
volume_driver = tools.rig.loop_driver.LoopFileDriver
volume_backend_name = loop
loop_directory = {d}/cinder/volumes
"""

NFS_BACKEND = """[nfs]
volume_driver = cinder.volume.drivers.nfs.NfsDriver
volume_backend_name = nfs
nfs_shares_config = {d}/cinder/nfs-shares
nfs_mount_point_base = {d}/cinder/mnt
nas_secure_file_operations = false
nas_secure_file_permissions = false
"""

RBD_BACKEND = """[rbd]
volume_driver = cinder.volume.drivers.rbd.RBDDriver
volume_backend_name = rbd
rbd_cluster_name = {cluster}
rbd_ceph_conf = {conf}
rbd_user = admin
rbd_pool = volumes
rbd_flatten_volume_from_snapshot = false
"""

GLANCE_RBD = """[ceph]
rbd_store_ceph_conf = {conf}
rbd_store_user = admin
rbd_store_pool = images
rbd_thin_provisioning = true
"""

GLANCE_STORE = """[{store}]
cinder_store_auth_address = {auth_url}
cinder_store_user_name = glance
cinder_store_password = {password}
cinder_store_project_name = service
cinder_catalog_info = block-storage:cinder:publicURL
cinder_volume_type = {store}
cinder_state_transition_timeout = 60
cinder_mount_point_base = {d}/glance/mnt
"""

GLANCE_BRICK = """[os_brick]
lock_path = {d}/lock
[privsep_osbrick]
helper_command = {venv}/bin/privsep-helper --config-file {d}/glance/glance-api.conf
"""

# For a kernel without NFS: `mount -t nfs` of Cinder and Glance is a bind mount of the directory that stands for it.
MOUNT = """#!/bin/sh
case " $* " in
*" -t nfs "*) for point; do :; done; exec {mount} --bind {share} "$point" ;;
*) exec {mount} "$@" ;;
esac
"""

_FAKEAUTH = """
[filter:fakeauth]
paste.filter_factory = tools.rig.rigauth:filter_factory
anonymous = notused
"""


def paste_ini(stock: str) -> str:
    """Return Cinder's stock paste file in which `noauth` is the rig's fake auth: roles and projects are real."""
    return stock.replace("osprofiler noauth apiv3", "osprofiler fakeauth keystonecontext apiv3", 1) + _FAKEAUTH
