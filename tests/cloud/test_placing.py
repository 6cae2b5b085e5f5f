"""Where servers come to be, as users and operators see it: hints, forced places, and why there was none."""

from kilonova.store import servers
from tests.stories import telling


def test_operators_see_which_rule_turned_away_how_many(tmp_path):
    with telling(tmp_path) as cloud:
        s = cloud.boot(flavor="huge")
        said = "No valid host was found. There are not enough hosts available."
        theirs = cloud.json("GET", f"/servers/{s.id}", token=cloud.admin)["server"]["fault"]
        assert (theirs["message"], theirs["details"]) == (said, f"{said} Of 3 hosts: room turned away 3.")
        mine = cloud.json("GET", f"/servers/{s.id}")["server"]["fault"]
        assert mine["message"] == said and "details" not in mine


def test_servers_go_to_others_or_away_from_them(tmp_path):
    with telling(tmp_path) as cloud:
        one = cloud.boot("one")

        def boot(name, **hints):
            wish = {"name": name, "flavorRef": "small", "imageRef": cloud.image_id, "networks": "auto"}
            made = cloud.json("POST", "/servers", {"server": wish, "os:scheduler_hints": hints}, ok=202)["server"]["id"]
            cloud.settle()
            with cloud.db.read() as tx:
                return servers.get(tx, made)

        for i in range(3):
            assert boot(f"near{i}", same_host=one.id).host == one.row.host
        far = boot("far", different_host=[one.id])
        assert far.host not in (None, one.row.host)
        third = boot("third", different_host=[one.id, far.id])
        assert third.host not in (None, one.row.host, far.host)
        assert boot("nowhere", different_host=[one.id, far.id, third.id]).vm_state == "error"
        assert boot("near-nobody", same_host="00000000-0000-4000-8000-000000000009").vm_state == "error"
        cloud.check()
