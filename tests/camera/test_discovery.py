"""Which of the cameras that answer is the one the settings mean."""

from dataclasses import replace

import pytest

from flawline.camera.discovery import Device, choose
from flawline.config.errors import CameraError, ConfigError
from flawline.config.settings_camera import CameraSettings

DEVICES = [
    Device("genicam", 0, "Acme", "One", "SN1", "left", "10.0.0.2", "00:0c:df:04:aa:01"),
    Device("genicam", 1, "Acme", "One", "SN2", "right", "10.0.0.3", "00:0c:df:04:aa:02"),
    Device("genicam", 2, "Acme", "Two", "SN3", "left", "usb 1-4"),
]


def chosen(devices: list[Device] | None = None, before: Device | None = None, **keys: object) -> int:
    settings = CameraSettings.model_validate({"name": "top", "backend": "genicam", **keys})
    return choose(settings, DEVICES if devices is None else devices, before).index


@pytest.mark.parametrize(
    ("keys", "index"),
    [
        ({"serial": "SN2"}, 1),
        ({"address": "10.0.0.3"}, 1),
        ({"address": "00:0C:DF:04:AA:02"}, 1),
        ({"address": "00-0c-df-04-aa-02"}, 1),
        ({"address": "000cdf04aa01"}, 0),
        ({"address": "usb 1-4"}, 2),
        ({"user_name": "right"}, 1),
        ({"user_name": "left", "address": "10.0.0.2"}, 0),
        ({"index": 2}, 2),
        ({"index": 0, "serial": "SN1"}, 0),
    ],
)
def test_a_camera_is_chosen_by_what_is_given(keys: dict[str, object], index: int) -> None:
    assert chosen(**keys) == index


def test_the_only_one_needs_no_choice() -> None:
    assert chosen(DEVICES[1:2]) == 1


@pytest.mark.parametrize(
    "keys", [{"serial": "SN"}, {"address": "10.0.0.9"}, {"address": ""}, {"user_name": "Left"}, {"index": 3}]
)
def test_one_that_is_not_there_may_come_back(keys: dict[str, object]) -> None:
    [(key, value)] = keys.items()
    with pytest.raises(CameraError, match=rf"camera 'top': no genicam camera answers with {key} = {value!r}; .*SN1"):
        chosen(**keys)
    with pytest.raises(CameraError, match="cameras that do: Acme One"):
        chosen(serial="SN1", address="10.0.0.3")
    with pytest.raises(CameraError, match="no camera answers; cameras that do: none"):
        chosen([])


def test_several_that_fit_are_a_wrong_configuration() -> None:
    with pytest.raises(ConfigError, match="3 cameras answer; choose one by serial, address, user_name or index"):
        chosen()
    with pytest.raises(ConfigError, match="2 cameras answer to user_name = 'left'"):
        chosen(user_name="left")
    silent = [Device("gentl", 0, serial="0"), Device("gentl", 1, serial="1")]
    with pytest.raises(ConfigError, match="choose one by serial, user_name or index: camera"):
        chosen(silent)


@pytest.mark.parametrize("keys", [{"index": 0}, {}])
def test_what_only_a_place_in_the_list_says_stays_the_first_camera(keys: dict[str, object]) -> None:
    first, second, usb = DEVICES
    assert chosen([second, replace(first, index=1, serial="")], first, **keys) == 1, "its place has changed"
    assert chosen([replace(usb, index=0)], usb, **keys) == 0
    for other in (second, usb):  # another serial number, without a MAC address, is another camera too
        with pytest.raises(CameraError, match=r"Acme One .*SN1.* was opened first, does not answer; .*Acme"):
            chosen([other], first, **keys)
    with pytest.raises(CameraError, match="cameras that do: none"):
        chosen([], first, **keys)


def test_an_exchanged_camera_is_taken_where_the_settings_name_what_it_has() -> None:
    exchanged = Device("genicam", 0, "Acme", "One", "SN9", "left", "10.0.0.2", "00:0c:df:04:aa:09")
    assert chosen([exchanged], DEVICES[0], address="10.0.0.2") == 0
    assert chosen([exchanged], DEVICES[0], user_name="left") == 0
