// Command probe tries one way out and says what came of it: a static program,
// as no library to be preloaded could socksify it.
//
//	probe tcp|udp HOST:PORT    the first line of what comes back
//	probe http URL             what is fetched
//	probe icmp ADDRESS         sends an echo request by a raw socket
//	probe unix PATH            connects
//	probe serve ADDRESS:PORT   sends back what comes, over TCP
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"
)

func main() {
	line, err := try(os.Args[1], os.Args[2])
	if err != nil {
		var errno syscall.Errno
		errors.As(err, &errno)
		fmt.Println("error:", err)
		os.Exit(max(1, int(errno)))
	}
	fmt.Println(line)
}

func try(how, where string) (string, error) {
	if how == "serve" {
		return "", serve(where)
	}
	if how == "http" {
		r, err := (&http.Client{Timeout: 10 * time.Second}).Get(where)
		if err != nil {
			return "", err
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		return string(b), err
	}
	if how == "icmp" {
		c, err := net.Dial("ip4:icmp", where)
		if err != nil {
			return "", err
		}
		_, err = c.Write([]byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0})
		return "sent", err
	}
	c, err := net.DialTimeout(how, where, 5*time.Second)
	if err != nil || how == "unix" {
		return "connected", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write([]byte("hello\n")); err != nil {
		return "", err
	}
	return bufio.NewReader(c).ReadString('\n')
}

func serve(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println("serving")
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			io.Copy(c, c)
			c.Close()
		}()
	}
}
