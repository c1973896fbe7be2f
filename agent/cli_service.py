"""The service on the command line: doctor, service install and uninstall, backup, restore."""

import json
import os
import sys
from pathlib import Path

import click

from flawline.agent import service_files
from flawline.agent.backup import back_up
from flawline.agent.doctor import examine, load_for_doctor
from flawline.agent.restore import restore
from flawline.config.errors import ConfigError
from flawline.config.sources import load_settings

CONFIG = click.option("--config", "file", type=click.Path(path_type=Path, dir_okay=False), help="the TOML file")
PREFIX = click.option(
    "--prefix",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    default=Path("/"),
    show_default=True,
    help="write below this folder, and call no command of systemd's",
)
DRY_RUN = click.option("--dry-run", is_flag=True, help="show, and change nothing")
_MARK = {"ok": "ok     ", "warning": "WARNING", "fail": "FAIL   "}


@click.command()
@CONFIG
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="override one key")
@click.option("--json", "as_json", is_flag=True, help="one JSON object: healthy, findings")
def doctor(file: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check this machine and a configuration, and say what to do about what is wrong.

    Exit code 0: nothing fails (there may be warnings); 1: something does; 2: the configuration is wrong.
    """
    settings = load_for_doctor(lambda: load_settings(file, overrides), file)
    findings = []
    for finding in examine(settings):
        findings.append(finding)
        if not as_json:
            click.echo(f"{_MARK[finding.verdict]} {finding.check}: {finding.found}")
            if finding.remedy:
                click.echo(f"        -> {finding.remedy}")
    failed = sum(finding.verdict == "fail" for finding in findings)
    if as_json:
        report = {"healthy": not failed, "findings": [finding.table() for finding in findings]}
        click.echo(json.dumps(report, indent=1))
    elif failed:
        click.echo(f"{failed} of {len(findings)} findings must be mended")
    sys.exit(1 if failed else 0)


@click.group()
def service() -> None:
    """Run flawline as a service of systemd."""


@service.command()
@click.option("--station", default="line1", show_default=True, help="the first station's name")
@PREFIX
@DRY_RUN
def install(station: str, prefix: Path, dry_run: bool) -> None:
    """Show units, user and example configuration, then write them. A configuration that is there is kept."""
    _check(station, prefix, dry_run)
    wanted = service_files.service_files(prefix, station)
    for wanted_file in wanted:
        action = wanted_file.action()
        click.echo(f"{action:8} {wanted_file.path}")
        if action in ("new", "changed"):
            click.echo("".join(f"    | {line}\n" for line in wanted_file.text.splitlines()), nl=False)
    if dry_run:
        return
    for wanted_file in wanted:
        service_files.write(wanted_file)
    if prefix == Path("/"):
        for command in service_files.commands_after_install():
            click.echo(f"run      {' '.join(command)}")
            if said := service_files.carry_out(command):
                click.echo(f"    | {said}")
    click.echo(f"next:    edit /etc/flawline/{station}.toml, then: systemctl enable --now flawline@{station}")


@service.command()
@PREFIX
@DRY_RUN
def uninstall(prefix: Path, dry_run: bool) -> None:
    """Stop all stations and take the units away. Configuration, keys and journals stay."""
    _check("line1", prefix, dry_run)
    commands = list(service_files.commands_before_uninstall(prefix))
    for command in commands:
        click.echo(f"run      {' '.join(command)}")
        if not dry_run and prefix == Path("/"):
            service_files.carry_out(command)
    for wanted_file in service_files.service_files(prefix, "line1", Path(sys.executable)):
        if wanted_file.users_own or not wanted_file.path.exists():
            continue
        click.echo(f"remove   {wanted_file.path}")
        if not dry_run:
            service_files.remove(wanted_file)
    if not dry_run and prefix == Path("/"):
        service_files.carry_out(["systemctl", "daemon-reload"])
    click.echo("kept:    /etc/flawline, /var/lib/flawline and the user flawline")


def _check(station: str, prefix: Path, dry_run: bool) -> None:
    load_settings(overrides=[f"station={station}"], environ={})  # refuses what is no name
    if prefix == Path("/") and not dry_run and os.geteuid() != 0:
        raise ConfigError("--prefix /: installing for this machine needs root; try --dry-run to see what it would do")


@click.command()
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE")
@click.option("--config", "file", type=click.Path(path_type=Path, dir_okay=False), required=True, help="the station's")
@click.option("--pictures", is_flag=True, help="the archived pictures too")
def backup(target: Path, file: Path, pictures: bool) -> None:
    """Write a station's configuration, recipes, memories, keys and journal into FILE (mode 0600; keep it safe).

    The station may go on running.
    """
    settings = load_for_doctor(lambda: load_settings(file), file)
    for path in back_up(file, settings, target, pictures=pictures, warn=_warn):
        click.echo(path)


def _warn(text: str) -> None:
    click.echo(f"warning: {text}", err=True)


@click.command("restore")
@click.argument("source", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE")
@click.option(
    "--prefix",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    default=Path("/"),
    show_default=True,
    help="put everything below this folder",
)
@click.option("--force", is_flag=True, help="overwrite what is there")
@click.option(
    "--skip-numbers",
    type=click.IntRange(min=0),
    help="sequence numbers that may be out since the backup [default: 100 for every second since]",
)
@click.option(
    "--everywhere", is_flag=True, help="also what lies outside the folders of configuration, state and memories"
)
def restore_command(source: Path, prefix: Path, force: bool, skip_numbers: int | None, everywhere: bool) -> None:
    """Put a backup's files back where they came from. The station must not be running.

    Run by root, a backup decides what the station does and who may connect: restore only what you trust.
    """
    done = restore(source, prefix, force=force, skip_numbers=skip_numbers, everywhere=everywhere)
    for path in done.written:
        click.echo(path)
    if done.skipped:
        click.echo(f"numbers go on at least {done.skipped} above the backup's; the status announces it as seq_jump")


SERVICE: list[click.Command] = [doctor, service, backup, restore_command]
