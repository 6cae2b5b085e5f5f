# From network_data.json's lines: "mac address/length gateway|none dns..." for each network that has no DHCP.
{ v[$1] = $2 }

END {
    for (l = 0; ("links." l ".id") in v; l++) mac[v["links." l ".id"]] = tolower(v["links." l ".ethernet_mac_address"])
    for (s = 0; ("services." s ".address") in v; s++) dns = dns " " v["services." s ".address"]
    for (n = 0; (p = "networks." n ".") && (p "type") in v; n++) {
        if (v[p "type"] != "ipv4") continue
        gateway = "none"
        for (r = 0; (p "routes." r ".network") in v; r++)
            if (v[p "routes." r ".network"] == "0.0.0.0") gateway = v[p "routes." r ".gateway"]
        own = dns
        for (s = 0; (p "services." s ".address") in v; s++) own = own " " v[p "services." s ".address"]
        address = v[p "ip_address"]
        if (address !~ /\//) address = address "/" ones(v[p "netmask"])
        print mac[v[p "link"]], address, gateway own
    }
}

function ones(mask,    part, i, n, b) {
    split(mask, part, ".")
    for (i = 1; i <= 4; i++) for (b = part[i]; b > 0; b = int(b / 2)) n += b % 2
    return n + 0
}
