"""--model-dir and --lora-dir over HTTP: files come, go and are damaged while a server runs."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints.lora_files import ATTENTION, as_peft, random_lora, shapes_of, write_lora
from tests.helpers.clients import error_of, image_of
from tests.helpers.servers import Server, wait_until

REQUEST = {"prompt": "red apple", "seed": 5, "steps": 2, "width": 64, "height": 64}
KEYS = {"user": "user-key-1", "admin": "admin-key-1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny: Path) -> Path:
    """A folder as A1111 lays it out, with the models `one` and `two`, a LoRA and a broken file."""
    root = tmp_path_factory.mktemp("models")
    for name in ("one", "two"):
        shutil.copytree(tiny, root / "Stable-diffusion" / name)
    (root / "Stable-diffusion" / "broken.safetensors").write_bytes(b"no tensors" * 9)
    (root / "Lora").mkdir()
    ink = random_lora(shapes_of(tiny, *ATTENTION))
    write_lora(root / "Lora" / "ink.safetensors", as_peft(ink))
    return root


@pytest.fixture(scope="module")
def server(start_server, folder: Path, tmp_path_factory) -> Iterator[Server]:
    key_files = tmp_path_factory.mktemp("keys")
    for name, key in KEYS.items():
        (key_files / name).write_text(key)
    files = {"LDM_API_KEY_FILE": str(key_files / "user"), "LDM_ADMIN_KEY_FILE": str(key_files / "admin")}
    settings = {"LDM_MODEL_DIR": str(folder), "LDM_REPLICAS": "2", "LDM_INVARIANT": "1", "LDM_BUCKETS": "4"}
    with start_server(**settings, **files) as server:
        server.client.headers["X-API-Key"] = KEYS["admin"]
        yield server


def post(server: Server, path: str, **body) -> dict:
    answer = server.client.post(path, json=body or None)
    assert answer.status_code == 200, answer.text
    return answer.json()


def rescan(server: Server) -> dict:
    return post(server, "/models/rescan")


def generate(server: Server, **changes):
    return server.client.post("/generate", json=REQUEST | changes)


@pytest.fixture
def add(server: Server, folder: Path, tiny: Path) -> Iterator[Callable[[str], Path]]:
    """A function that copies a model into the folder; at the end the copies are gone."""
    copies = []

    def copy(name: str) -> Path:
        copies.append(folder / "Stable-diffusion" / name)
        return Path(shutil.copytree(tiny, copies[-1]))

    yield copy
    for path in copies:
        shutil.rmtree(path, ignore_errors=True)
    rescan(server)


def loaded(server: Server) -> set[str]:
    return {model["name"] for model in server.client.get("/models").json()["models"] if model["loaded"]}


def test_models_are_found_and_loaded_at_their_first_request(server):
    listed = {model["name"]: model for model in server.client.get("/models").json()["models"]}
    assert list(listed) == ["one", "two"]
    assert not listed["one"]["loaded"]
    assert listed["one"]["bytes"] is None
    assert listed["two"]["loras"] == ["ink"]
    assert generate(server, loras={"ink": 1.0}).json()["model"] == "one"
    assert loaded(server) == {"one"}
    assert (image_of(generate(server)) != image_of(generate(server, loras={"ink": 1.0}))).any()


def test_a_new_file_is_served_after_a_rescan_and_not_when_it_is_gone(server, add):
    assert error_of(generate(server, model="three"), 404)["param"] == "model"
    path = add("three")
    assert rescan(server)["added"] == ["three"]
    assert (image_of(generate(server, model="three")) == image_of(generate(server, model="one"))).all()
    shutil.rmtree(path)
    assert rescan(server)["removed"] == ["three"]
    error_of(generate(server, model="three"), 404)
    wait_until(lambda: "three" not in loaded(server))


def test_the_answer_of_a_rescan_names_what_is_ignored_without_a_path(server, folder):
    answer = rescan(server)
    assert [file["file"] for file in answer["ignored"]] == [
        f"{folder.name}/Stable-diffusion/broken.safetensors"
    ]
    assert "corrupt" in answer["ignored"][0]["reason"]
    assert str(folder) not in str(answer)


def test_a_file_that_disappears_is_an_error_that_names_the_model_and_others_are_served(server, folder, add):
    path = add("lost")
    rescan(server)
    shutil.rmtree(path)
    error = error_of(generate(server, model="lost"), 500)
    assert error["code"] == "model_unreadable"
    assert "'lost'" in error["message"]
    assert str(folder) not in error["message"]
    assert generate(server, model="two").status_code == 200
    assert server.metric("ldm_worker_restarts_total") == 0


def test_a_damaged_file_is_ignored_after_a_rescan_and_served_again_when_it_is_whole(server, folder):
    config = folder / "Stable-diffusion" / "two" / "unet" / "config.json"
    whole = config.read_text()
    config.write_text("{")
    answer = rescan(server)
    assert answer["removed"] == ["two"]
    assert any("two" in file["file"] for file in answer["ignored"])
    config.write_text(whole)
    assert rescan(server)["added"] == ["two"]
    assert generate(server, model="two").status_code == 200


def test_a_lora_that_is_gone_is_one_error(server, folder, tiny):
    file = folder / "Lora" / "oil.safetensors"
    write_lora(file, as_peft(random_lora(shapes_of(tiny, *ATTENTION), seed=2)))
    assert rescan(server)["loras"] == ["ink", "oil"]
    assert generate(server, loras={"oil": 0.5}).status_code == 200
    file.unlink()
    assert error_of(generate(server, loras={"oil": 0.7}), 500)["code"] == "lora_unreadable"
    assert rescan(server)["loras"] == ["ink"]
    assert error_of(generate(server, loras={"oil": 0.5}), 422)["param"] == "loras"


def test_models_are_loaded_and_unloaded_on_demand(server):
    state = post(server, "/models/two/load")
    assert state == {
        "name": "two",
        "loaded": True,
        "bytes": state["bytes"],
        "dtype": "float32",
        "backend": "torch",
    }
    assert state["bytes"] > 0
    unloaded = dict.fromkeys(("bytes", "dtype", "backend"))
    assert post(server, "/models/two/unload") == {"name": "two", "loaded": False} | unloaded
    assert post(server, "/models/two/unload")["loaded"] is False
    for act in ("load", "unload"):
        assert error_of(server.client.post(f"/models/none/{act}"), 404)["param"] == "name"


def test_unloading_waits_for_the_jobs_of_the_model(server):
    answers = []
    job = threading.Thread(target=lambda: answers.append(generate(server, model="two", steps=200, n=4)))
    job.start()
    wait_until(lambda: server.metric("ldm_jobs_running") > 0)
    assert post(server, "/models/two/unload")["loaded"] is False
    job.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["images"]) == 4


def test_a_rescan_during_jobs_drops_none(server, add):
    path = add("passing")
    rescan(server)
    answers = []
    job = threading.Thread(target=lambda: answers.append(generate(server, model="passing", steps=200, n=4)))
    job.start()
    wait_until(lambda: server.metric("ldm_jobs_running") > 0)
    shutil.rmtree(path)
    assert rescan(server)["removed"] == ["passing"]
    job.join()
    assert answers[0].status_code == 200


def test_a_new_worker_serves_the_same_list(server, add):
    add("later")
    server.kill_worker()
    wait_until(lambda: server.is_ready)
    names = [model["name"] for model in server.client.get("/models").json()["models"]]
    assert names == ["one", "two"]
    assert rescan(server)["added"] == ["later"]


@pytest.mark.parametrize(
    "path",
    ["/models/rescan", "/models/one/load", "/models/one/unload", "/sdapi/v1/refresh-checkpoints",
     "/sdapi/v1/unload-checkpoint", "/sdapi/v1/reload-checkpoint"],
)  # fmt: skip
def test_these_calls_need_an_admin_key(server, path):
    for key, status in (("wrong-key-1", 401), (KEYS["user"], 403), (KEYS["admin"], 200)):
        answer = server.client.post(path, headers={"X-API-Key": key})
        assert answer.status_code == status, answer.text
    error = server.client.post(path, headers={"X-API-Key": KEYS["user"]}).json()["error"]
    assert error["code"] == "admin_key_required"


def test_an_ordinary_key_generates(server):
    answer = server.client.post("/generate", json=REQUEST, headers={"X-API-Key": KEYS["user"]})
    assert answer.status_code == 200


def test_clients_of_a1111_refresh_then_choose_then_generate(server, add):
    """As SillyTavern and Open WebUI do. A chosen model that is gone counts as none."""
    path = add("fresh")
    post(server, "/sdapi/v1/refresh-checkpoints")
    titles = [model["title"] for model in server.client.get("/sdapi/v1/sd-models").json()]
    assert titles == ["fresh", "one", "two"]
    for title in ("fresh", "fresh.safetensors", "fresh [0123abcdef]", "fresh.safetensors [0123abcdef]"):
        server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "one"})
        server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": title})
        assert server.client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "fresh"
    post(server, "/sdapi/v1/reload-checkpoint")
    assert "fresh" in loaded(server)
    body = {"prompt": "red apple", "steps": 2, "width": 64, "height": 64, "seed": 5}
    assert len(post(server, "/sdapi/v1/txt2img", **body)["images"]) == 1
    override = {"override_settings": {"sd_model_checkpoint": "two.safetensors"}}
    assert len(post(server, "/sdapi/v1/txt2img", **body, **override)["images"]) == 1
    post(server, "/sdapi/v1/unload-checkpoint")
    assert "fresh" not in loaded(server)
    assert [lora["name"] for lora in server.client.get("/sdapi/v1/loras").json()] == ["ink"]
    shutil.rmtree(path)
    post(server, "/sdapi/v1/refresh-checkpoints")
    assert server.client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "one"
    assert len(post(server, "/sdapi/v1/txt2img", **body)["images"]) == 1
