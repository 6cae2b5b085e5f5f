"""What OpenStack's own acceptance tests found, told again: small answers that real programs compare letter by letter."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.stories import telling


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    with telling(tmp_path_factory.mktemp("tempest")) as c:
        yield c


def test_a_certificate_is_made_with_its_key(cloud):
    wish = {"keypair": {"name": "windows", "type": "x509"}}
    made = cloud.json("POST", "/os-keypairs", wish, ok=201, version="2.2")["keypair"]
    certificate = x509.load_pem_x509_certificate(made["public_key"].encode())
    key = serialization.load_pem_private_key(made["private_key"].encode(), None)
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    assert certificate.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)
    assert made["type"] == "x509" and len(made["fingerprint"].split(":")) == 20
    assert "private_key" not in cloud.json("GET", "/os-keypairs/windows", version="2.2")["keypair"]


def test_nobody_has_access_to_a_new_private_flavor(cloud):
    wish = {"name": "secret", "id": "secret", "ram": 64, "vcpus": 1, "disk": 1, "os-flavor-access:is_public": False}
    cloud.json("POST", "/flavors", {"flavor": wish}, token=cloud.admin)
    assert cloud.json("GET", "/flavors/secret/os-flavor-access", token=cloud.admin) == {"flavor_access": []}


def test_addresses_are_shown_in_one_form(cloud):
    s = cloud.boot("addressed", accessIPv6="0000:0000:0000:0000:0000:babe:220.12.22.2")
    assert s.show()["accessIPv6"] == "::babe:dc0c:1602"


def test_a_slash_behind_a_path_is_another_path(cloud):
    cloud.json("GET", "/", ok=200)
    cloud.json("GET", "/os-simple-tenant-usage", ok=200, token=cloud.admin)
    for path in ("/os-simple-tenant-usage/", "/servers/", "/flavors/small/"):
        told = {"OpenStack-API-Version": "compute 2.96"}
        answer = cloud.services.ask("GET", f"/compute/v2.1{path}", None, cloud.admin, **told)
        assert answer.status == 404


def test_a_simulated_hypervisor_says_how_long_it_is_up(cloud):
    one = cloud.json("GET", "/os-hypervisors", token=cloud.admin, version="2.1")["hypervisors"][0]["id"]
    shown = cloud.json("GET", f"/os-hypervisors/{one}/uptime", token=cloud.admin, version="2.1")["hypervisor"]
    assert "load average" in shown["uptime"]
