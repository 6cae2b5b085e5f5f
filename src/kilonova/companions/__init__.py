"""Small, real, replaceable neighbours: identity, images, networks, behind their standard APIs."""
