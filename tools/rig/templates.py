"""The configuration files of the rig's services, as functions of a few values."""

GLANCE = """[DEFAULT]
log_file = {d}/log/glance.log
enabled_backends = {backends}
enabled_import_methods = [glance-direct]
show_image_direct_url = true
show_multiple_locations = true
[paste_deploy]
flavor = {flavor}
config_file = {d}/glance/glance-api-paste.ini
[database]
connection = sqlite:///{d}/glance.sqlite?timeout=60
sqlite_synchronous = false
[glance_store]
default_backend = fs
[fs]
filesystem_store_datadir = {d}/glance/images
filesystem_thin_provisioning = true
[web]
https_insecure = true
[import_filtering_opts]
allowed_hosts = [{host}]
allowed_ports = [80,443,{web_port}]
[os_glance_staging_store]
filesystem_store_datadir = {d}/glance/staging
[os_glance_tasks_store]
filesystem_store_datadir = {d}/glance/tasks
[oslo_concurrency]
lock_path = {d}/lock
"""

AUTHTOKEN = """[keystone_authtoken]
www_authenticate_uri = {keystone_url}
auth_url = {keystone_url}
auth_type = password
username = {user}
password = {password}
project_name = service
user_domain_id = default
project_domain_id = default
service_token_roles = service
service_token_roles_required = true
token_cache_time = 5
"""

KEYSTONE = """[DEFAULT]
log_file = {d}/log/keystone.log
[database]
connection = sqlite:///{d}/keystone/keystone.sqlite?timeout=60
sqlite_synchronous = false
[token]
provider = fernet
expiration = {expiration_s}
[fernet_tokens]
key_repository = {d}/keystone/fernet
[fernet_receipts]
key_repository = {d}/keystone/fernet
[credential]
key_repository = {d}/keystone/credential
[cache]
enabled = true
backend = oslo_cache.dict
[identity]
password_hash_rounds = 4
"""

_FAKEAUTH = """
[composite:glance-api-fakeauth]
paste.composite_factory = glance.api:root_app_factory
/: api
/healthcheck: healthcheck
[filter:fakeauth]
paste.filter_factory = tools.rig.rigauth:filter_factory
"""


def paste_ini(stock: str) -> str:
    """Return Glance's stock paste file with one more pipeline, `fakeauth`."""
    pipeline = "fakeauth = cors http_proxy_to_wsgi versionnegotiation osprofiler fakeauth context rootapp"
    return stock.replace("\ndefault = cors", f"\n{pipeline}\ndefault = cors", 1) + _FAKEAUTH
