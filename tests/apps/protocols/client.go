// Clients of server.go: `client KIND PORT WORK COUNT TLS`. KIND is `http1`, `http1-resumed`, `h2`, `expect` or `events`. They print
// what client.js prints, and end as its clients do. TLS is the folder of the certificate.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

var sessions = tls.NewLRUClientSessionCache(1)

func transport(kind string, roots *x509.CertPool) *http.Transport {
	config := &tls.Config{RootCAs: roots, ServerName: "localhost"}
	if kind == "http1-resumed" {
		config.ClientSessionCache = sessions
	}
	return &http.Transport{
		TLSClientConfig:       config,
		ForceAttemptHTTP2:     kind == "h2" || kind == "events",
		ExpectContinueTimeout: 30 * time.Second,
	}
}

// Sends one request on a new connection. Returns a word about it.
func ask(kind, port, id string, roots *x509.CertPool) (string, error) {
	transport := transport(kind, roots)
	defer transport.CloseIdleConnections()
	url, body, expected := "https://127.0.0.1:"+port+"/"+id, "", "done "+id+" 0\n"
	if kind == "events" {
		url, expected = "https://127.0.0.1:"+port+"/events/"+id, ""
		for number := 1; number <= 5; number++ {
			expected += fmt.Sprintf("data: %d events/%s\n\n", number, id)
		}
	}
	method := "GET"
	if kind == "expect" {
		method, body = "POST", strings.Repeat("x", 1000)
		expected = fmt.Sprintf("done %s %d\n", id, len(body))
	}
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	if kind == "expect" {
		request.Header.Set("Expect", "100-continue")
	}
	response, err := (&http.Client{Transport: transport, Timeout: 30 * time.Second}).Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	if string(text) != expected {
		return "", fmt.Errorf("%q instead of %q", text, expected)
	}
	if response.TLS.DidResume {
		return "resumed", nil
	}
	return response.Proto, nil
}

func loop(kind, port string, client int, roots *x509.CertPool, ending *atomic.Bool) {
	for number := 0; !ending.Load(); number++ {
		id := fmt.Sprintf("%d-%d", client, number)
		word, err := ask(kind, port, id, roots)
		var failure *net.OpError
		switch {
		case err == nil:
			fmt.Println("ok", word)
		case errors.As(err, &failure) && failure.Op == "dial":
			fmt.Println("refused", err)
			return
		default:
			fmt.Println("failed", id, err)
		}
		time.Sleep(time.Duration(rand.Intn(60)) * time.Millisecond)
	}
}

func main() {
	certificate, err := os.ReadFile(os.Args[5] + "/cert.pem")
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(certificate)
	work, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	count, err := strconv.Atoi(os.Args[4])
	if err != nil {
		log.Fatal(err)
	}
	var clients sync.WaitGroup
	var ending atomic.Bool
	for client := 0; client < count; client++ {
		clients.Add(1)
		go func(client int) {
			defer clients.Done()
			time.Sleep(time.Duration(client*work/count) * time.Millisecond)
			loop(os.Args[1], os.Args[2], client, roots, &ending)
		}(client)
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		ending.Store(true)
	}()
	clients.Wait()
}
