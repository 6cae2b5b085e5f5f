# JSON (RFC 8259) as lines of "path<TAB>value"; strings unescaped but for line feeds, which stay \n.
{ text = text $0 " " }

END { at("") }

function skip() { if (match(text, /^[ \t\r\n]+/)) text = substr(text, RLENGTH + 1) }

function at(path,    c, n) {
    skip()
    c = substr(text, 1, 1)
    if (c == "{" || c == "[") {
        text = substr(text, 2)
        for (n = 0; ; n++) {
            skip()
            if (substr(text, 1, 1) ~ /[]}]/) break
            if (c == "{") {
                at_key = string()
                skip()
                text = substr(text, 2)
                at(path == "" ? at_key : path "." at_key)
            } else
                at(path == "" ? n : path "." n)
            skip()
            if (substr(text, 1, 1) != ",") break
            text = substr(text, 2)
        }
        text = substr(text, 2)
    } else if (c == "\"")
        print path "\t" string()
    else {
        match(text, /^[^],} \t\r\n]*/)
        print path "\t" substr(text, 1, RLENGTH)
        text = substr(text, RLENGTH + 1)
    }
}

function string(    s, out, c) {
    match(text, /^"([^"\\]|\\.)*"/)
    s = substr(text, 2, RLENGTH - 2)
    text = substr(text, RLENGTH + 1)
    out = ""
    while (match(s, /\\/)) {
        c = substr(s, RSTART + 1, 1)
        out = out substr(s, 1, RSTART - 1)
        s = substr(s, RSTART + 2)
        if (c == "u") {
            out = out utf8(hex(substr(s, 1, 4)))
            s = substr(s, 5)
        } else
            out = out (c == "n" ? "\\n" : c == "t" ? " " : c ~ /[rbf]/ ? "" : c)
    }
    return out s
}

function hex(s,    i, n) {
    for (i = 1; i <= length(s); i++) n = n * 16 + index("0123456789abcdef", tolower(substr(s, i, 1))) - 1
    return n
}

function utf8(n) {
    if (n < 128) return n < 32 ? "" : sprintf("%c", n)
    if (n < 2048) return sprintf("%c%c", 192 + int(n / 64), 128 + n % 64)
    return sprintf("%c%c%c", 224 + int(n / 4096), 128 + int(n / 64) % 64, 128 + n % 64)
}
