"""What of an address is shown."""

import pytest

from flawline.config.passwords import bare_address, hide_passwords

GIVEN = [  # the password is `geheim` wherever one stands
    "rtsp://admin:geheim@cam/s",
    "rtsp://geheim@cam/s",
    "rtsp://admin:pa/geheim@cam/s",
    "rtsp://admin:pa?geheim@cam/s",
    "rtsp://admin:geheim/80@cam/s",
    "rtsp://admin:p geheim@cam/s",
    "rtsp://admin:p@geheim@cam:554/s",
    "rtsp://cam/user=admin_password=geheim_channel=1",
    "rtsp://cam/user=admin&password=geheim&channel=1",
    "rtsp://cam/user=admin_password=ge@x?geheim/1_geheim=1",
    "http://cam/v?loginuse=admin&loginpas=geheim",
    "http://cam/v?usr=a&psw=geheim&pw=geheim;p=geheim",
    "http://cam/v?auth=geheim==",
    "http://cam/v?%70wd=geheim",
    "http://cam/v?geheim",
    "http://cam/v?pw=ge@geheim",
    "http://cam/geheim?x@geheim",
]


@pytest.mark.parametrize("address", GIVEN[:-1])
@pytest.mark.parametrize("around", ["{}", 'url = "{}"\nfps = 5\n', "no {} answers", "{} and {}"])
def test_no_password_is_left_in_an_address(address: str, around: str) -> None:
    shown = hide_passwords(around.replace("{}", address))
    assert "geheim" not in shown
    assert "cam" in shown or "***" in shown
    assert shown.startswith(around.partition("{}")[0])
    assert shown.endswith(around.rpartition("{}")[2])


@pytest.mark.parametrize("address", GIVEN)
def test_scheme_host_and_port_are_published(address: str) -> None:
    shown = bare_address(address)
    assert shown in (address.partition("://")[0] + "://cam", "rtsp://cam:554", "rtsp://***", "http://***")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://user:p@ss@host/1", "rtsp://***@host/1"),
        ("rtsp://a:1@h rtsp://b:2@h", "rtsp://***@h rtsp://***@h"),
        ("http://cam/?user=a&pwd=x", "http://cam/?user=***&pwd=***"),
        ("rtsp://cam/user=admin_password=x_channel=1", "rtsp://cam/user=admin_password=***"),
        (r'url = "rtsp://u:a\"b\\@cam/1" # c@d', 'url = "rtsp://***@cam/1" # c@d'),
        ("rtsp://10.0.0.5:554/1 is gone, tell me@plant.org", "rtsp://10.0.0.5:554/1 is gone, tell me@plant.org"),
        ("http://[::1]:80/a/b.cgi", "http://[::1]:80/a/b.cgi"),
        ("why? a=b, pw=c", "why? a=b, pw=c"),
    ],
)
def test_the_rest_of_a_text_stays(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://user:x@192.168.10.40:554/stream1", "rtsp://192.168.10.40:554"),
        ("http://[fe80::1]:80/v?a=b", "http://[fe80::1]:80"),
        ("rtsp://cam", "rtsp://cam"),
        ("/dev/video0", "/dev/video0"),
        ("recordings/shift1.avi", "recordings/shift1.avi"),
    ],
)
def test_what_is_published_of_an_address(address: str, shown: str) -> None:
    assert bare_address(address) == shown
