// HTTPS with HTTP/1 and HTTP/2, as net/http does it, without signal handling: `server PORT WORK`. A request takes WORK
// milliseconds; the answer repeats the path. `/events/ID` sends five events meanwhile.
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

func main() {
	work, err := strconv.Atoi(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	pause := time.Duration(work) * time.Millisecond
	answer := func(response http.ResponseWriter, request *http.Request) {
		id := strings.TrimPrefix(request.URL.Path, "/")
		if !strings.HasPrefix(id, "events/") {
			bytes, _ := io.Copy(io.Discard, request.Body)
			time.Sleep(pause)
			fmt.Fprintf(response, "done %s %d\n", id, bytes)
			return
		}
		for number := 1; number <= 5; number++ {
			fmt.Fprintf(response, "data: %d %s\n\n", number, id)
			response.(http.Flusher).Flush()
			time.Sleep(pause / 5)
		}
	}
	certificate, err := tls.LoadX509KeyPair(os.Args[3]+"/cert.pem", os.Args[3]+"/key.pem")
	if err != nil {
		log.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"h2", "http/1.1"}}
	// All workers have the same key, so that a session can be resumed at another one.
	config.SetSessionTicketKeys([][32]byte{{1}})
	listener, err := net.Listen("tcp", ":"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(answer), TLSConfig: config, ErrorLog: log.New(io.Discard, "", 0)}
	log.Fatal(server.ServeTLS(listener, "", ""))
}
