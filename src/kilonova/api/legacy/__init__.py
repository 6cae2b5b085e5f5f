"""What the Compute API once answered for its neighbours: forwarded to them, in the caller's name, as long as it lived.

Until 2.35, as a rule; later versions answer 404.  A file is what it forwards to.
"""

from kilonova.api.legacy import addresses, baremetal, images, networks, security, volumes

GROUPS = (addresses, baremetal, images, networks, security, volumes)
