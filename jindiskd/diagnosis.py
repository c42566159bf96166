"""The doctor behind the bus: host, image and domain as the service's own user sees them, and libvirt's word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from jindiskd.base.platform import Platform
from jindiskd.doctor import host, image, policy
from jindiskd.doctor.check import Check, Verdict, note, ok, problem, unknown
from jindiskd.doctor.host import Surroundings
from jindiskd.domain.service import DomainService
from jindiskd.errors import InvalidArgument, JindiskError
from jindiskd.image.service import ImageService
from jindiskd.image.signing import policy_of
from jindiskd.image.store import StoredImage


class DiagnosisBackend:
    """Looks at things and changes none.

    Args:
        images: the images.
        domains: the domains.
        surroundings: where the host's files are.
        broker_spki_sha256: what new images pin.
        key_problem: why the key of an image id would not be released; blocks.
    """

    def __init__(
        self,
        images: ImageService,
        domains: DomainService,
        *,
        surroundings: Surroundings,
        broker_spki_sha256: bytes,
        key_problem: Callable[[str], str],
    ) -> None:
        self._images, self._domains, self._where = images, domains, surroundings
        self._pin, self._key_problem = broker_spki_sha256, key_problem

    async def diagnose(self, *, image: str, domain: str, platform: str) -> Sequence[Mapping[str, object]]:
        """One dictionary a check; see the contract.

        Raises:
            NotFound, InvalidArgument: nothing can be looked at under that name.
        """
        wanted = _platform(platform)
        checks: list[Check] = []
        demanded: int | None = None
        if domain:
            view = self._domains.get(domain)
            image = image or view.image
            checks += await self._domain(domain)
            demanded = await self._policy(domain)
        if image:
            stored = await self._images.get(image)
            wanted = wanted or stored.manifest.platform
            checks += await asyncio.to_thread(self._image, stored, demanded)
        checks = [*await asyncio.to_thread(lambda: list(host.examine(self._where))), *checks]
        checks += await self._libvirt([wanted] if wanted else [p for p in Platform if not p.simulated])
        return [_row(check) for check in relevant(checks, wanted)]

    def _image(self, stored: StoredImage, demanded: int | None) -> list[Check]:
        """`demanded`: the guest policy of the domain that was asked about; the image's if None."""
        manifest = stored.manifest
        why = self._key_problem(manifest.image_id)
        found = list(image.examine(stored, broker_spki_sha256=self._pin, key_problem=why))
        if not manifest.platform.simulated:  # where the host's processor does not matter
            bits = policy_of(manifest) if demanded is None else demanded
            found += policy.examine(bits, manifest.platform.tee, self._where)
        return found

    async def _policy(self, key: str) -> int | None:
        try:
            return await self._domains.guest_policy(key)
        except JindiskError:  # told by the check of the definition
            return None

    async def _domain(self, key: str) -> list[Check]:
        try:
            why = await self._domains.problem(key)
        except JindiskError as exc:
            return [unknown("domain.definition", f"it cannot be read: {exc}", "start libvirtd")]
        if why:
            return [problem("domain.definition", why, "follow that, or launch the image anew: 'jindiskctl launch'")]
        return [ok("domain.definition", "started as it is defined, it would attest as its image")]

    async def _libvirt(self, platforms: Iterable[Platform]) -> list[Check]:
        if not self._domains.connection.connected:
            remedy = "start libvirtd, and put this service's user into the group libvirt"
            return [problem("host.libvirt", "libvirt is not connected", remedy)]
        checks = [ok("host.libvirt", "libvirt is connected")]
        for platform in platforms:
            name, tees = f"host.launch.{platform}", [] if platform.simulated else [platform.tee]
            try:
                why = await self._domains.host_problem(platform)
            except JindiskError as exc:
                checks.append(unknown(name, f"libvirt cannot be asked: {exc}", "try again", tees))
                continue
            if why:
                checks.append(problem(name, why, "see the checks of the host above", tees))
            else:
                checks.append(ok(name, f"libvirt can start guests of platform {platform}", tees))
        return checks


def relevant(checks: Iterable[Check], wanted: Platform | None) -> list[Check]:
    """What matters for a platform; without one, what only some platforms need is no problem but a note."""
    found = []
    for check in checks:
        if wanted is None:
            demoted = check.tees and check.verdict is Verdict.PROBLEM
            found.append(note(check.id, check.found, check.remedy, check.tees) if demoted else check)
        elif not check.tees or (not wanted.simulated and wanted.tee in check.tees):
            found.append(check)
    return found


def _platform(name: str) -> Platform | None:
    if not name:
        return None
    if name not in set(Platform):
        raise InvalidArgument("platform", name[:100], f"it is one of {', '.join(Platform)}")
    return Platform(name)


def _row(check: Check) -> Mapping[str, object]:
    return {
        "id": check.id,
        "verdict": check.verdict.value,
        "found": check.found,
        "remedy": check.remedy,
        "tees": sorted(tee.value for tee in check.tees),
    }
