"""Settings against a camera that locks and limits: its description, in GenICam's own implementation of GenApi."""

import struct
from collections.abc import Callable

import pytest
from genicam import genapi

from flawline.camera.configure import configure
from flawline.camera.genapi import GenApiFeatures
from flawline.config.errors import ConfigError
from flawline.config.settings_camera import CameraSettings

SELECTOR, MODE, SOURCE, RATE_ENABLE, LOAD = 0x00, 0x08, 0x10, 0x18, 0x20
EXPOSURE, RATE = 0x40, 0x48


def register(name: str, address: int, kind: str = "IntReg") -> str:
    sign = "<Sign>Signed</Sign>" if kind == "IntReg" else ""
    return (
        f'<{kind} Name="{name}Reg"><Address>{address}</Address><Length>8</Length><AccessMode>RW</AccessMode>'
        f"<pPort>Device</pPort>{sign}<Endianess>LittleEndian</Endianess></{kind}>"
    )


def choice(name: str, address: int, entries: tuple[str, ...], locked: str = "", mode: str = "RW") -> str:
    listed = "".join(f'<EnumEntry Name="{entry}"><Value>{i}</Value></EnumEntry>' for i, entry in enumerate(entries))
    lock = f"<pIsLocked>{locked}</pIsLocked>" if locked else ""
    return (
        f'<Enumeration Name="{name}">{lock}<ImposedAccessMode>{mode}</ImposedAccessMode>{listed}'
        f"<pValue>{name}Reg</pValue></Enumeration>{register(name, address)}"
    )


def number(name: str, address: int, limit: str, locked: str = "") -> str:
    lock = f"<pIsLocked>{locked}</pIsLocked>" if locked else ""
    return (
        f'<Float Name="{name}">{lock}<pValue>{name}Reg</pValue><Min>1</Min><pMax>{name}Max</pMax></Float>'
        f'<SwissKnife Name="{name}Max"><pVariable Name="ENABLE">RateEnableReg</pVariable>'
        f'<pVariable Name="EXPOSURE">ExposureTimeReg</pVariable><pVariable Name="RATE">AcquisitionFrameRateReg'
        f"</pVariable><Formula>{limit}</Formula></SwissKnife>{register(name, address, 'FloatReg')}"
    )


def description(trigger_mode: str) -> str:
    """TriggerSource and the rate's switch are locked in trigger mode; rate and exposure limit each other."""
    nodes = [
        choice("TriggerSelector", SELECTOR, ("AcquisitionStart", "FrameStart")),
        choice("TriggerSource", SOURCE, ("Software", "Line1", "Line3"), locked="TriggerModeReg"),
        number("ExposureTime", EXPOSURE, "ENABLE ? 1000000 / RATE : 9000000"),
        number("AcquisitionFrameRate", RATE, "1000000 / EXPOSURE", locked="RateLock"),
        '<IntSwissKnife Name="RateLock"><pVariable Name="ENABLE">RateEnableReg</pVariable>'
        "<Formula>ENABLE = 0</Formula></IntSwissKnife>",
        '<Boolean Name="AcquisitionFrameRateEnable"><pIsLocked>TriggerModeReg</pIsLocked><pValue>RateEnableReg</pValue>'
        f"<OnValue>1</OnValue><OffValue>0</OffValue></Boolean>{register('RateEnable', RATE_ENABLE)}",
        '<Command Name="UserSetLoad"><pValue>UserSetLoadReg</pValue><CommandValue>1</CommandValue></Command>'
        f"{register('UserSetLoad', LOAD)}",
        '<Port Name="Device"/>',
    ]
    if trigger_mode:
        nodes.append(choice("TriggerMode", MODE, ("Off", "On"), mode=trigger_mode))
    else:
        nodes.append(register("TriggerMode", MODE))
    return (
        '<RegisterDescription ModelName="Strict" VendorName="Flawline" ToolTip="" StandardNameSpace="None" '
        'SchemaMajorVersion="1" SchemaMinorVersion="1" SchemaSubMinorVersion="0" MajorVersion="1" MinorVersion="0" '
        'SubMinorVersion="0" ProductGuid="4a8c2a9e-0d3b-4d5e-9c43-000000000001" '
        'VersionGuid="4a8c2a9e-0d3b-4d5e-9c43-000000000002" xmlns="http://www.genicam.org/GenApi/Version_1_1">'
        f"{''.join(nodes)}</RegisterDescription>"
    )


class Memory(genapi.AbstractPort):
    """The camera's registers. They outlive a connection; UserSetLoad overwrites them with `user_set`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = bytearray(0x80)
        self.user_set: bytes | None = None
        self.put(EXPOSURE, 10_000.0)
        self.put(RATE, 50.0)

    def put(self, address: int, value: float) -> None:
        struct.pack_into("<d" if isinstance(value, float) else "<q", self.bytes, address, value)

    def get(self, address: int) -> float:
        return float(struct.unpack_from("<d" if address >= EXPOSURE else "<q", self.bytes, address)[0])

    def get_access_mode(self) -> int:
        return int(genapi.EAccessMode.RW)

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.bytes[address : address + length])

    def write(self, address: int, value: bytes) -> None:
        self.bytes[address : address + len(value)] = value
        if address == LOAD and self.user_set is not None:
            self.bytes[:] = self.user_set


Configure = Callable[..., GenApiFeatures]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def apply(memory: Memory) -> Configure:
    """Connects anew, as at a start of the program, and writes the settings."""

    def connect(trigger_mode: str = "RW", **keys: object) -> GenApiFeatures:
        node_map = genapi.NodeMap()
        node_map.load_xml_from_string(description(trigger_mode))
        node_map.connect(memory, "Device")
        features = GenApiFeatures(node_map, genapi)
        configure(CameraSettings.model_validate({"name": "top", "backend": "gentl", **keys}), features)
        return features

    return connect


def trigger(features: GenApiFeatures) -> tuple[object, ...]:
    return tuple(features.read(f"Trigger{name}") for name in ("Selector", "Mode", "Source"))


def test_a_camera_that_still_waits_for_one_trigger_is_given_another(apply: Configure) -> None:
    assert trigger(apply(trigger="software")) == ("FrameStart", "On", "Software")
    assert trigger(apply(trigger="hardware")) == ("FrameStart", "On", "Line1")
    assert trigger(apply(trigger="hardware", features={"TriggerSource": "Line3"})) == ("FrameStart", "On", "Line3")
    assert trigger(apply(trigger="software")) == ("FrameStart", "On", "Software")
    assert trigger(apply()) == ("FrameStart", "Off", "Software")


def test_the_trigger_s_mode_is_the_last_word_wherever_the_table_has_it(apply: Configure) -> None:
    table = {"TriggerMode": "On", "TriggerSource": "Line3", "AcquisitionFrameRateEnable": True}
    assert trigger(apply(features=table)) == ("FrameStart", "On", "Line3")
    table = {"TriggerMode": "Off", "TriggerSource": "Line1"}
    assert trigger(apply(trigger="hardware", features=table)) == ("FrameStart", "Off", "Line1")


def test_a_selector_in_the_table_says_whose_mode_is_meant(apply: Configure) -> None:
    table = {"TriggerSource": "Line3", "TriggerSelector": "AcquisitionStart"}
    assert trigger(apply(trigger="hardware", features=table)) == ("AcquisitionStart", "On", "Line3")


def test_rate_and_exposure_that_limit_each_other_change_in_either_direction(apply: Configure, memory: Memory) -> None:
    for fps, exposure in ((50.0, 15_000.0), (5.0, 150_000.0), (100.0, 8_000.0)):
        apply(fps=fps, features={"ExposureTime": exposure})
        assert [memory.get(place) for place in (RATE_ENABLE, RATE, EXPOSURE)] == [1, fps, exposure]
    with pytest.raises(ConfigError, match=r"camera 'top': fps = 100\.0: out of range; the camera allows 1 to 50"):
        apply(fps=100.0, features={"ExposureTime": 20_000.0})


def test_a_rate_in_the_table_wins_over_fps(apply: Configure, memory: Memory) -> None:
    apply(fps=20.0, features={"AcquisitionFrameRate": 10.0})
    assert [memory.get(place) for place in (RATE_ENABLE, RATE)] == [1, 10.0]


def test_the_last_run_s_rate_limits_no_triggers(apply: Configure, memory: Memory) -> None:
    apply(fps=5.0)
    assert memory.get(RATE_ENABLE) == 1
    apply(trigger="hardware")
    assert memory.get(RATE_ENABLE) == 0
    apply(trigger="hardware", features={"AcquisitionFrameRateEnable": True})
    assert memory.get(RATE_ENABLE) == 1
    apply(trigger="software", features={"AcquisitionFrameRateEnable": True, "AcquisitionFrameRate": 30.0})
    assert [memory.get(place) for place in (RATE_ENABLE, RATE)] == [1, 30.0]


@pytest.mark.parametrize("word", [True, "true", "True"])
def test_a_user_set_does_not_bring_its_own_trigger_with_it(apply: Configure, memory: Memory, word: object) -> None:
    apply(trigger="hardware", features={"TriggerSource": "Line3", "ExposureTime": 7_000.0})
    memory.user_set = bytes(memory.bytes)
    apply(trigger="software")
    memory.put(EXPOSURE, 500.0)
    assert trigger(apply(trigger="software", features={"UserSetLoad": word})) == ("FrameStart", "On", "Software")
    assert memory.get(EXPOSURE) == 7_000.0


@pytest.mark.parametrize("word", [False, "false", "yes", 1])
def test_a_command_is_sent_by_true_alone(apply: Configure, word: object) -> None:
    with pytest.raises(ConfigError, match=r"features\.UserSetLoad = .*: it is a command: write true to send it"):
        apply(features={"UserSetLoad": word})


@pytest.mark.parametrize("trigger_mode", ["RO", ""])
def test_a_camera_that_only_runs_freely_need_not_let_its_mode_be_written(
    apply: Configure, memory: Memory, trigger_mode: str
) -> None:
    apply(trigger_mode, fps=20.0, features={"ExposureTime": 5_000.0})
    assert memory.get(RATE) == 20.0
    with pytest.raises(ConfigError, match="TriggerMode"):
        apply(trigger_mode, trigger="software")


def test_a_camera_that_can_only_wait_is_refused_in_free_run(apply: Configure, memory: Memory) -> None:
    memory.put(MODE, 1)
    with pytest.raises(ConfigError, match="the camera does not let TriggerMode be set now"):
        apply("RO")
    assert trigger(apply("RO", trigger="software"))[1] == "On"
