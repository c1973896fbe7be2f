"""What the GenICam backends have in common, on a camera of registers in GenICam's own implementation of GenApi."""

import queue
import struct
import time
from collections.abc import Callable

import numpy as np
import pytest
from genicam import genapi
from test_feature_order import choice, register

from flawline.camera.device_camera import Block, DeviceCamera
from flawline.camera.discovery import Device
from flawline.camera.features import FeatureMap
from flawline.camera.genapi import GenApiFeatures
from flawline.config.errors import CameraError, ConfigError
from flawline.config.settings_camera import CameraSettings

MODE, SOURCE, TRIGGER, STATUS_SELECTOR, STATUS, SELECTOR = 0x00, 0x08, 0x10, 0x18, 0x20, 0x28
PICTURE = np.zeros((2, 2), np.uint8)
TRIGGERED = (
    choice("TriggerMode", MODE, ("Off", "On"))
    + choice("TriggerSource", SOURCE, ("Software", "Line1"))
    + f'<Command Name="TriggerSoftware"><pValue>TriggerSoftwareReg</pValue><CommandValue>1</CommandValue></Command>'
    f"{register('TriggerSoftware', TRIGGER)}"
)
READINESS = (
    choice("AcquisitionStatusSelector", STATUS_SELECTOR, ("AcquisitionActive", "FrameTriggerWait"))
    + '<Boolean Name="AcquisitionStatus"><pValue>AcquisitionStatusReg</pValue><OnValue>1</OnValue>'
    f"<OffValue>0</OffValue></Boolean>{register('AcquisitionStatus', STATUS).replace('RW', 'RO')}"
)
TRIGGERS = ("AcquisitionStart", "FrameBurstStart", "FrameStart")
EACH_MODE = 0x40  # three of them, as the selector says
SELECTED = (
    choice("TriggerSelector", SELECTOR, TRIGGERS)
    + choice("TriggerMode", EACH_MODE, ("Off", "On")).replace(
        f"<Address>{EACH_MODE}</Address>",
        f'<Address>{EACH_MODE}</Address><pIndex Offset="8">TriggerSelectorReg</pIndex>',
    )
    + choice("TriggerSource", SOURCE, ("Software", "Line1"))
)
AUTO, EXPOSURE, RATIO_SELECTOR, RATIO = 0x30, 0x38, 0x58, 0x60  # two ratios, as the selector says
EXPOSED_BY_ITSELF = (
    choice("ExposureAuto", AUTO, ("Off", "Continuous"))
    + '<Integer Name="ExposureTime"><pIsLocked>ExposureAutoReg</pIsLocked><pValue>ExposureTimeReg</pValue></Integer>'
    + register("ExposureTime", EXPOSURE)
)
BALANCED = (
    choice("BalanceRatioSelector", RATIO_SELECTOR, ("Red", "Blue"))
    + '<Integer Name="BalanceRatioRaw"><pValue>BalanceRatioRawReg</pValue><Max>999</Max></Integer>'
    + register("BalanceRatioRaw", RATIO).replace(
        "</Address>", '</Address><pIndex Offset="8">BalanceRatioSelectorReg</pIndex>'
    )
)
SLOW = "".join(
    f'<Float Name="{name}"><pValue>{name}Reg</pValue></Float>{register(name, address, "FloatReg")}'
    for name, address in (("AcquisitionFrameRate", 0x70), ("ExposureTime", EXPOSURE))
)
SECOND = {"ExposureTime": 1e6}
HEAD = (
    '<RegisterDescription ModelName="StandIn" VendorName="Flawline" ToolTip="" StandardNameSpace="None" '
    'SchemaMajorVersion="1" SchemaMinorVersion="1" SchemaSubMinorVersion="0" MajorVersion="1" MinorVersion="0" '
    'SubMinorVersion="0" ProductGuid="4a8c2a9e-0d3b-4d5e-9c43-000000000003" '
    'VersionGuid="4a8c2a9e-0d3b-4d5e-9c43-000000000004" xmlns="http://www.genicam.org/GenApi/Version_1_1">'
)


class Registers(genapi.AbstractPort):
    """The camera's registers. After a trigger it takes no other until its status has been read `busy_for` times."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = bytearray(0x80)
        self.busy_for = 3
        self._busy = 0
        self.exposures = 0
        self.ignored = 0

    def get_access_mode(self) -> int:
        return int(genapi.EAccessMode.RW)

    def read(self, address: int, length: int) -> bytes:
        if address == STATUS:
            self._busy -= 1
            waits = self._busy < 0 and self.bytes[STATUS_SELECTOR] == 1
            return struct.pack("<q", waits)
        return bytes(self.bytes[address : address + length])

    def write(self, address: int, value: bytes) -> None:
        self.bytes[address : address + len(value)] = value
        if address == TRIGGER:
            if self._busy > 0:
                self.ignored += 1
            else:
                self.exposures += 1
                self._busy = self.busy_for


class StandIn(DeviceCamera):
    """A camera whose blocks are put into `sent`."""

    vendor_errors = (genapi.GenericException,)

    def __init__(self, nodes: str, **keys: object) -> None:
        super().__init__(CameraSettings.model_validate({"name": "top", "backend": "gentl", **keys}))
        self.registers = Registers()
        self.sent: queue.Queue[Block] = queue.Queue()
        self._nodes = nodes
        self._map: genapi.NodeMap | None = None

    def connect(self) -> tuple[Device, FeatureMap]:
        self._map = genapi.NodeMap()
        self._map.load_xml_from_string(f'{HEAD}{self._nodes}<Port Name="Device"/></RegisterDescription>')
        self._map.connect(self.registers, "Device")
        return Device("gentl", 0, model="StandIn"), GenApiFeatures(self._map, genapi)

    def start(self) -> None:
        pass

    def receive(self, timeout_s: float) -> Block | None:
        try:
            return self.sent.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def check_alive(self) -> None:
        pass

    def disconnect(self) -> None:
        pass


Make = Callable[..., StandIn]


@pytest.fixture
def stand_in() -> Make:
    def make(nodes: str, **keys: object) -> StandIn:
        source = StandIn(nodes, **keys)
        source.open()
        return source

    return make


def wait(source: StandIn, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert source.grab(0.1) is None


def fire(source: StandIn) -> None:
    source.await_readiness()
    source.trigger()


def test_a_camera_is_not_triggered_before_it_says_that_it_waits(stand_in: Make) -> None:
    source = stand_in(TRIGGERED + READINESS, trigger="software")
    for _ in range(4):
        fire(source)
    assert (source.registers.exposures, source.registers.ignored) == (4, 0)
    source.registers.busy_for = 10_000
    fire(source)
    with pytest.raises(CameraError, match="camera 'top': software trigger: not ready for one within 500 ms"):
        source.await_readiness()


def test_a_camera_that_never_says_that_it_waits_is_asked_once(stand_in: Make) -> None:
    source = stand_in(TRIGGERED + READINESS, trigger="software")
    source.registers._busy = 1_000_000
    source.await_readiness()
    before = source.registers._busy
    source.await_readiness()
    assert source.registers._busy == before


def test_a_camera_without_such_a_status_is_triggered_at_once(stand_in: Make) -> None:
    source = stand_in(TRIGGERED, trigger="software")
    fire(source)
    assert source.registers.exposures == 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [({}, [0, 0, 0]), ({"trigger": "hardware"}, [0, 0, 1])],
)
def test_no_other_trigger_is_left_on(keys: dict[str, object], expected: list[int]) -> None:
    """The camera would wait for it for ever."""
    source = StandIn(SELECTED, **keys)
    for number in range(3):
        source.registers.bytes[EACH_MODE + 8 * number] = 1
    source.open()
    assert [source.registers.bytes[EACH_MODE + 8 * number] for number in range(3)] == expected
    assert TRIGGERS[source.registers.bytes[SELECTOR]] == "FrameStart"


def test_what_the_table_sets_the_camera_does_not_set_by_itself() -> None:
    source = StandIn(EXPOSED_BY_ITSELF, features={"ExposureTime": 800})
    source.registers.bytes[AUTO] = 1
    source.open()
    assert source.registers.bytes[AUTO] == 0
    assert int.from_bytes(source.registers.bytes[EXPOSURE : EXPOSURE + 8], "little") == 800
    source = StandIn(EXPOSED_BY_ITSELF, features={"ExposureAuto": "Continuous", "ExposureTime": 900})
    with pytest.raises(ConfigError, match="let ExposureTime be set now, ExposureAuto being 'Continuous'"):
        source.open()


def test_one_feature_is_written_under_several_entries_of_its_selector() -> None:
    source = StandIn(BALANCED, features={"BalanceRatioRaw[Blue]": 130, "BalanceRatioRaw[Red]": 70})
    source.open()
    assert [source.registers.bytes[RATIO + 8 * number] for number in range(2)] == [70, 130]
    assert source.registers.bytes[RATIO_SELECTOR] == 0
    for table, words in (
        ({"BalanceRatioRaw[Green]": 1}, r"features.BalanceRatioRaw\[Green\] = 'Green': the camera allows Red, Blue"),
        ({"BalanceRatioRaw[Blue]": 5000}, r"features.BalanceRatioRaw\[Blue\] = 5000: out of range"),
        ({"LineMode[Line1]": "Input"}, r"features.LineMode\[Line1\]: the camera has no selector for 'LineMode'"),
    ):
        with pytest.raises(ConfigError, match=words):
            StandIn(BALANCED, features=table).open()


def test_after_a_power_cycle_the_clock_is_mapped_anew() -> None:
    """The camera counts from its start: opened again, it may say more than the last frame of before did."""
    with StandIn("") as source:
        now = time.monotonic_ns()
        source.sent.put(Block(1, now - 10**12, PICTURE, "Mono8"))
        assert source.grab(1) is not None
        source.close()
        time.sleep(0.5)
        source.open()
        source.sent.put(Block(1, now - 10**12 + 10**6, PICTURE, "Mono8"))
        frame = source.grab(1)
        assert frame is not None
        assert time.monotonic_ns() - frame.mono_grab < 4 * 10**8


@pytest.mark.parametrize("keys", [{"fps": 0.5}, {"features": {"AcquisitionFrameRate": "0.5"}}, {"features": SECOND}])
def test_a_camera_that_is_asked_for_slow_frames_has_not_stalled(stand_in: Make, keys: dict[str, object]) -> None:
    source = stand_in(SLOW, stall_s=0.5, **keys)
    wait(source, 1.2)
    with pytest.raises(CameraError, match=r"has sent no frame for \d"):
        wait(source, 6.0)
