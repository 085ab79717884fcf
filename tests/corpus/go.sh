# Builds, tests and runs a Go program.
# Attack: critical exec.new /tmp/go-build1/b001/exe/main

export HOME=/root GOPROXY=off GOFLAGS=-mod=mod CGO_ENABLED=0

prepare() {
    mkdir -p /root/module/sum /root/module/words
    cd /root/module
    printf 'module example.test/module\n\ngo 1.19\n' >go.mod
    cat >sum/sum_test.go <<'END'
package sum

import "testing"

func TestOf(t *testing.T) {
	if Of(1, 2) != 3 {
		t.Fatal("not three")
	}
}
END
    cat >words/words.go <<'END'
package words

import "strings"

func Count(text string) int { return len(strings.Fields(text)) }
END
    cat >words/words_test.go <<'END'
package words

import "testing"

func TestCount(t *testing.T) {
	if Count("a b c") != 3 {
		t.Fatal("not three")
	}
}
END
    cat >main.go <<'END'
package main

import (
	"fmt"

	"example.test/module/sum"
	"example.test/module/words"
)

//go:generate go run ./generate

func main() { fmt.Println(sum.Of(1, 2), words.Count("a b")) }
END
    mkdir generate
    cat >generate/main.go <<'END'
package main

import "os"

func main() { os.WriteFile("generated.txt", []byte("generated\n"), 0o644) }
END
}

round() {
    cd /root/module
    number=$((${number:-0} + 1))
    printf 'package sum\n\n// Of is build %s.\nfunc Of(a, b int) int { return a + b + %s - %s }\n' \
        "$number" "$number" "$number" >sum/sum.go
    go vet ./...
    go generate ./...
    go test ./...
    go run .
    go build -o /usr/local/bin/module .
    module
}

attack() {
    mkdir -p /tmp/go-build1/b001/exe
    cp /.control/payload /tmp/go-build1/b001/exe/main
    /tmp/go-build1/b001/exe/main
}
