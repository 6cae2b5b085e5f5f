"""What a server's make rules out, whatever state it is in (states.md, section 4): asked before its lock and its state."""

from kilonova.kit.errors import Invalid
from kilonova.model.server import Server


def without_tpm(server: Server, operation: str) -> None:
    """Raises Invalid where its secrets lie in a TPM of its own: they would not come along."""
    if server.flavor.extra_specs.get("hw:tpm_version") or server.image.properties.get("hw_tpm_version"):
        raise Invalid(f"Operation '{operation}' not supported for vTPM-enabled instance ({server.id}).")
